"""What a person types: `python -m jobs VERB ...`, the recipes, and the demo's data."""
