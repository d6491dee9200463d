"""Where weights live while a pipeline runs."""
