"""Reports: what a run says about itself."""
