"""How the page's own parts look; gradio's variables give the colours, so that dark pages work."""

CSS = """
.fv-message { padding: .7em 1em; border-radius: 8px; background: var(--background-fill-secondary); }
.fv-done { border-left: 4px solid #2a9d5c; }
.fv-error { border-left: 4px solid #c0392b; }
.fv-idle { padding: 1.2em; opacity: .75; }
.fv-stages { display: flex; flex-wrap: wrap; gap: .5em 1.2em; }
.fv-stages { list-style: none; padding: 0; margin: 0 0 .5em; }
.fv-stages li { opacity: .45; }
.fv-stages .done { opacity: .8; }
.fv-stages .now { opacity: 1; font-weight: 600; }
.fv-bar { height: 8px; border-radius: 4px; background: var(--background-fill-secondary); overflow: hidden; }
.fv-bar i { display: block; height: 100%; background: var(--color-accent); transition: width .3s; }
.fv-line { margin: .4em 0; }
.fv-pictures { display: flex; flex-wrap: wrap; gap: 1em; }
.fv-pictures figure { margin: 0; }
.fv-preview { image-rendering: pixelated; border-radius: 6px; max-width: 320px; }
.fv-curve { width: 240px; }
.fv-result { display: flex; flex-direction: column; gap: .2em; }
.fv-result { padding: .7em 1em; border-left: 4px solid #2a9d5c; }
"""
