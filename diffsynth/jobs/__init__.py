"""Tasks, model loading and publishing of videos, shared by the command and the page."""
