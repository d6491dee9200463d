"""The web page of `fastvmt ui`: everything over the public API, gradio in page.py and app.py alone."""
