"""What command and page share: a task, loading a model by name, publishing a video."""
