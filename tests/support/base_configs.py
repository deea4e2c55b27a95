"""Configs that the others of a task include."""

# Path below configs/base without suffix, by task.
BASES = {"pretrain": "ssl", "detection": "detection", "classification": "cls"}
