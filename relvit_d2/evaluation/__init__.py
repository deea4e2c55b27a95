"""Detectron2 evaluators."""
