"""Queue a workflow of this pack on a running ComfyUI, with words, picture, seed and size of your own.

    python queue_workflow.py wan22_i2v_a14b.json --prompt "A cat yawns." --image cat.png --size 832*480

Standard library only. Prints the prompt's id; ComfyUI tells at /history/ID what became of it.
"""

import argparse
import json
import urllib.error
import urllib.request
import uuid
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="a file of workflows/api")
    parser.add_argument("--url", default="http://127.0.0.1:8188", help="of ComfyUI")
    parser.add_argument("--prompt", help="what to show")
    parser.add_argument("--image", type=Path, help="the start image, which is uploaded")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--size", help="width*height")
    args = parser.parse_args()
    graph = json.loads(args.workflow.read_text(encoding="utf-8"))
    graph = graph.get("prompt", graph)
    width, height = map(int, args.size.split("*")) if args.size else (None, None)
    change(graph, "WanCoreAestheticPrompt", text=args.prompt)
    change(graph, "LoadImage", image=args.image and upload(args.url, args.image))
    change(graph, "WanCoreSampler", seed=args.seed)
    for sized in ("WanCoreEmptyLatent", "WanCoreImageToVideo"):
        change(graph, sized, width=width, height=height)
    answer = post(f"{args.url}/prompt", json.dumps({"prompt": graph}).encode(), "application/json")
    print(answer["prompt_id"])


def change(graph: dict, kind: str, **values: object) -> None:
    """Set what was given on the first node of a kind; of a picture's loaders that is the start image."""
    nodes = [node for node in graph.values() if node["class_type"] == kind]
    for node in nodes[:1]:
        node["inputs"] |= {name: value for name, value in values.items() if value is not None}


def upload(url: str, image: Path) -> str:
    """Put a picture into ComfyUI's input folder; returns its name there."""
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{image.name}"\r\n\r\n'
    body = head.encode() + image.read_bytes() + f"\r\n--{mark}--\r\n".encode()
    return post(f"{url}/upload/image", body, f"multipart/form-data; boundary={mark}")["name"]


def post(url: str, body: bytes, kind: str) -> dict:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": kind})) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:  # ComfyUI says in its answer what is wrong with the workflow
        raise SystemExit(f"ComfyUI refuses it: {error.read().decode()}") from None
    except OSError as error:
        raise SystemExit(f"{url} does not answer: {error}") from None


if __name__ == "__main__":
    main()
