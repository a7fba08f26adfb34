"""Training: LoRA and full training of the diffusion transformers, full training of the autoencoders.

``dit.py`` and ``vae.py`` say what a step's loss is, ``loop.py`` walks the steps and survives a kill, ``data.py`` and
``cache.py`` bring the clips. ``nano/`` is the recipe of the small models that come with the pack.
"""
