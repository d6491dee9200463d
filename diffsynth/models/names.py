"""Names of modules and tensors in the layouts of diffusers, transformers and llama.cpp, and ours for them.

Modules are named by their paths; within a block, by the path after that of the block.
"""

import json
from collections.abc import Mapping
from pathlib import Path

_FILE = Path(__file__).with_name("names.json")
NAMES: Mapping[str, Mapping[str, Mapping[str, str]]] = json.loads(_FILE.read_text())
