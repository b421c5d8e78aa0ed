"""A checkpoint and its adapter as another version of transformers reads them: what they answer is
printed as JSON.

    PYTHONPATH=… python tests/serving/load.py FOLDER

Needs nothing of this package.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


IDS = torch.arange(5, 45)[None]


@torch.no_grad()
def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        chat, max_new_tokens=4, do_sample=False
    )
    found = {
        "version": transformers.__version__,
        "merged": model(IDS).logits[0, -1].tolist(),
        "prompt": tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False),
        "words": tokenizer("Hello there")["input_ids"],
        "ends": [tokenizer.eos_token, tokenizer.pad_token],
        "answer": answer[0]["generated_text"][-1]["content"],
        "use_cache": model.config.use_cache,
    }
    place = folder / "adapter"
    base = json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
    found["adapter"] = PeftModel.from_pretrained(model, place).eval()(IDS).logits[0, -1].tolist()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
