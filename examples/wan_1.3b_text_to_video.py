"""Generate a video with Wan2.1-T2V-1.3B, from text alone or moving like a reference video.

python examples/wan_1.3b_text_to_video.py --input_video REF.mp4 --prompt "A red fox runs through fresh snow."
"""

from generate import main

if __name__ == "__main__":
    main("models/Wan2.1-T2V-1.3B")
