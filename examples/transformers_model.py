"""Any transformers model made sparse: calibrate it, replace its Linears, generate.

    python -m examples.transformers_model HuggingFaceTB/SmolLM2-135M-Instruct README.md
"""

import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate import calibrate_module
from sparse_linear import replace_linears

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
tokens = tokenizer(Path(sys.argv[2]).read_text(), return_tensors="pt").input_ids[:, :1024]
calibration = calibrate_module(model, tokens.split(512, dim=1))

for sparsity in (0, 0.5):
    if sparsity > 0:
        replace_linears(model, calibration.thresholds(sparsity))
    start = time.perf_counter()
    text = model.generate(tokens[:, :16], max_new_tokens=64, min_new_tokens=64, do_sample=False)
    print(f"sparsity {sparsity}: {64 / (time.perf_counter() - start):.1f} tokens a second")
    print(tokenizer.decode(text[0]))
