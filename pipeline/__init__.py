"""The stages, each of which turns one config into one result by running hemoco on Ray."""
