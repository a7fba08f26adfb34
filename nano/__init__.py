"""The nano family: small models of every official kind, trained on a procedural world.

``world.py`` draws clips, ``captions.py`` tells them in words, ``evaluate.py`` measures clips, ``recipe.py`` is the
training, ``python -m nano`` walks it.
"""
