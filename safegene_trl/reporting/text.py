import json


def strict_json(v):
    return json.dumps(v, indent=2, ensure_ascii=False, allow_nan=False)
