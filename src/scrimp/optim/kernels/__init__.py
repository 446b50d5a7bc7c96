"""Steps and stores in C++, built on first use, behind the pieces that say what they compute."""
