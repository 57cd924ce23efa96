"""How a Hugging Face model becomes a HookedTransformer: behind `safety_lens.models`, which is the only way in."""
