"""A stand-in for vLLM and SGLang: a tiny model behind the fields that both have."""

import copy
import json
from collections import deque
from pathlib import Path

import torch
from servers import Answer, Server
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

STOP = 1
VOCABULARY = 40


def tiny_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=STOP,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


class Words:
    """As much of a tokenizer as an engine asks of one."""

    def encode(self, text):
        return [2 + len(word) for word in text.split()]

    def save_pretrained(self, folder):
        Path(folder, "tokenizer.json").write_text("{}")


class ModelServer(Server):
    """serves: "vllm" or "sglang". raw: log-probs from before temperature and top_p; ignores: fields
    of a request that it does not heed; adapters: whether they may be loaded; edits: what is done to
    the answers to come, one after the other."""

    def __init__(self, model, serves="vllm", raw=False, ignores=(), adapters=True):
        start = "/v1" if serves == "vllm" else ""
        routes = {"/v1/completions": self.complete, "/v1/models": self.models}
        if adapters:
            routes |= {
                f"{start}/load_lora_adapter": self.load,
                f"{start}/unload_lora_adapter": self.unload,
            }
        if serves == "sglang":
            routes |= {
                "/get_model_info": lambda _: {"model_path": self.path},
                "/update_weights_from_disk": self.update,
            }
        super().__init__(routes)
        self.base, self.serves, self.raw, self.ignores = model, serves, raw, ignores
        self.path, self.adapters = "tiny", {}
        self.edits = deque()

    def models(self, _):
        cards = [{"id": "tiny", "root": self.path}]
        return {"data": cards + [{"id": n, "root": p} for n, (p, _) in self.adapters.items()]}

    def load(self, request):
        from peft import PeftModel

        name, path = request.json["lora_name"], request.json["lora_path"]
        if name in self.adapters or not Path(path, "adapter_config.json").exists():
            return Answer(b'{"error": "no such adapter, or loaded already"}', 400)
        adapted = PeftModel.from_pretrained(copy.deepcopy(self.base), path).eval()
        self.adapters[name] = path, adapted
        return {"success": True}

    def unload(self, request):
        del self.adapters[request.json["lora_name"]]
        return {"success": True}

    def update(self, request):
        path = request.json["model_path"]
        try:
            self.base = AutoModelForCausalLM.from_pretrained(path).eval()
        except Exception as error:
            return Answer(json.dumps({"success": False, "message": str(error)}).encode(), 400)
        self.path = path
        return {"success": True, "message": "Succeeded"}

    def complete(self, request):
        asked = {k: v for k, v in request.json.items() if k not in self.ignores}
        name = asked.get("lora_path") or asked["model"]
        if name not in ("tiny", *self.adapters):
            return Answer(b"no such model", 404)
        model = self.adapters[name][1] if name in self.adapters else self.base
        answer = self._drawn(model, asked)
        edit = self.edits.popleft() if self.edits else None
        return answer if edit is None else edit(answer) or answer

    @torch.no_grad()
    def _drawn(self, model, asked):
        prompt, temperature = asked["prompt"], asked.get("temperature", 0.7)
        generator = torch.Generator().manual_seed(asked.get("seed", 0))
        ids, chosen, likeliest, finish = [], [], [], "length"
        while len(ids) < asked["max_tokens"] and finish == "length":
            logits = model(torch.tensor([prompt + ids])).logits[0, -1].double()
            raw = logits.log_softmax(0)
            kept = _kept((logits / (temperature or 1.0)).log_softmax(0), asked.get("top_p", 1.0))
            if temperature == 0:
                new = int(logits.argmax())
            else:
                new = int(torch.multinomial(kept.exp(), 1, generator=generator))
            said = raw if self.raw else kept
            top = said.topk(asked["logprobs"])
            ids.append(new)
            chosen.append(float(said[new]))
            values = top.values.clamp(min=-9999.0).tolist()
            pairs = zip(top.indices.tolist(), values, strict=True)
            likeliest.append({f"<{i}>": value for i, value in pairs})
            finish = "stop" if new in asked["stop_token_ids"] else "length"
        shown = ids
        if self.serves == "sglang" and finish == "stop" and not asked.get("no_stop_trim"):
            shown = ids[:-1]
        choice = {
            "index": 0,
            "text": " ".join(map(str, shown)),
            "finish_reason": finish,
            "stop_reason" if self.serves == "vllm" else "matched_stop": (
                ids[-1] if finish == "stop" else None
            ),
            "logprobs": {
                "tokens": [f"<{i}>" for i in shown],
                "token_logprobs": chosen,
                "top_logprobs": likeliest,
            },
        }
        if asked.get("return_token_ids"):
            choice |= {"prompt_token_ids": prompt, "token_ids": shown}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"object": "text_completion", "choices": [choice], "usage": usage}


def _kept(log_probs, top_p):
    """Renormalized over the likeliest tokens whose share reaches top_p."""
    falling, order = log_probs.sort(descending=True)
    outside = falling.exp().cumsum(0) - falling.exp() >= top_p
    return log_probs.index_fill(0, order[outside], -torch.inf).log_softmax(0)
