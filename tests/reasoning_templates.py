"""Chat templates of reasoning models, cut down to what matters here: what opens the reasoning, what
is inserted where there is none, what is left out of earlier turns.
"""

from transformers import PreTrainedTokenizerFast

from .conftest import make_tokenizer


# Qwen3: reasoning can be turned off; the last reply gets a block, empty or not, earlier ones none.
HYBRID = """\
{%- set last = namespace(user=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|assistant|>' -}}
{%- if loop.index0 > last.user and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content.lstrip('\\n') + '<|end|>\\n' -}}
{%- else -%}
{{- '<|' + m.role + '|>' + m.content + '<|end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}"""

# Qwen3-Thinking-2507: as Qwen3, and the prompt opens the reasoning, whatever is asked for.
THINKING = HYBRID[: HYBRID.index("{%- if add_generation_prompt -%}")] + (
    "{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}"
)

# DeepSeek-R1: the prompt opens the reasoning, and no reply keeps any.
STRIPPED = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' -}}
{%- else -%}
{{- '<|' + m.role + '|>' + m.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}"""

# gpt-oss: every turn has a channel, and so has the reasoning of the last reply.
CHANNELS = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking and loop.last -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- else -%}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""

TEMPLATES = {
    "hybrid": HYBRID,
    "thinking": THINKING,
    "stripped": STRIPPED,
    "channels": CHANNELS,
}


def reasoning_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a reasoning template: the marks of thinking are tokens that decoding keeps,
    those of channels are special ones.
    """
    if kind == "channels":
        tokenizer = make_tokenizer(("<|start|>", "<|channel|>", "<|message|>", "<|return|>"))
        tokenizer.eos_token = "<|return|>"
    else:
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer
