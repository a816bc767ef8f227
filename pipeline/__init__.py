"""The stages: each turns one config into one result by running hemoco on Ray."""
