"""Tune a quantized model on the lines of a text file with Accelerate: with_accelerate.py MODEL TEXTS OUT STEPS."""

import sys

from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import qzo

name, texts, out, steps = sys.argv[1:]
accelerator = Accelerator()
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name).to(accelerator.device)
zo = qzo.ZO([qzo.Scales(qzo.prepare(model), eps=0.03, lr=0.01)], seed=0)
rows = [{"input_ids": tokenizer(line)["input_ids"]} for line in open(texts).read().splitlines()]
loader = DataLoader(rows, batch_size=8, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
optimizer, loader = accelerator.prepare(zo, loader)  # the model stays as it is: nothing goes backward through it
while zo.steps < int(steps):
    for batch in loader:
        optimizer.step(lambda batch=batch: model(**batch).loss)
        accelerator.print(f"step {zo.last.step}  loss {zo.last.loss:.4f}")
model.save_pretrained(out)
