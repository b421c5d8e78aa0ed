"""Ask a safeguarded checkpoint something: it is an ordinary one and needs no safegene-trl.

    python examples/serve.py out/safeguarded "How do I boil an egg?"

The same folder goes to `vllm serve out/safeguarded`, `transformers serve`, or whatever else serves
checkpoints. One that was saved as an adapter (`output_format: adapter`) has one rank and alpha =
rank, so `vllm serve BASE --enable-lora --lora-modules safe=out/safeguarded` takes it, too.
"""

import argparse

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("question")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    options = parser.parse_args()
    generate = pipeline("text-generation", model=options.checkpoint, trust_remote_code=False)
    messages = [{"role": "user", "content": options.question}]
    answer = generate(messages, max_new_tokens=options.max_new_tokens, do_sample=False)[0][
        "generated_text"
    ]
    print(answer[-1]["content"])


if __name__ == "__main__":
    main()
