"""Config files to configs."""
