"""Tune a quantized model on the lines of a text file: plain_loop.py MODEL TEXTS OUT STEPS. A run with a journal is `qzo tune`."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qzo  # from here on transformers reads GPTQ, AWQ and compressed-tensors without their own packages

name, texts, out, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
zo = qzo.ZO([qzo.Scales(qzo.prepare(model), eps=0.03, lr=0.01)], seed=0)
schedule = torch.optim.lr_scheduler.LinearLR(zo, 1.0, 0.0, total_iters=int(steps))
lines = open(texts).read().splitlines()
for step in range(int(steps)):
    rows = [lines[(8 * step + i) % len(lines)] for i in range(8)]
    batch = tokenizer(rows, return_tensors="pt", padding=True).to(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = zo.step(lambda batch=batch, labels=labels: model(**batch, labels=labels).loss)
    schedule.step()
    print(f"step {step}  loss {loss:.4f}  d {zo.last.projected[0]:.3f}")
model.save_pretrained(out)
tokenizer.save_pretrained(out)
