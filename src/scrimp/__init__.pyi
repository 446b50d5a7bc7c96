from scrimp.api import train as train
from scrimp.base.errors import Interrupted as Interrupted
from scrimp.base.errors import ScrimpError as ScrimpError
from scrimp.recipe import Recipe as Recipe
from scrimp.recipe_file import load_recipe as load_recipe
from scrimp.training.run import Run as Run

__all__ = ["Interrupted", "Recipe", "Run", "ScrimpError", "__version__", "load_recipe", "train"]

__version__: str
