"""A short prompt, or a picture alone, made into a prompt such as Wan was trained on, by a language model.

``extend.PromptExtender`` tells the story; ``servers`` asks over HTTP, ``local_qwen`` on this machine.
"""

METHODS = ("local_qwen", "dashscope", "openai")
KEEP, STOP = "keep prompt", "stop"
ON_FAILURE = (KEEP, STOP)
