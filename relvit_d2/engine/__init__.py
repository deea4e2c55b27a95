"""The one trainer under all scripts."""
