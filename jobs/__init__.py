"""The command line (`python -m jobs VERB ...`), the recipes, and the data of the demo."""
