"""Tune a quantized model on the lines of a text file by transformers' Trainer: with_trainer.py MODEL TEXTS OUT STEPS."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

import qzo

name, texts, out, steps = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu")
zo = qzo.ZO([qzo.Scales(qzo.prepare(model), eps=0.03, lr=0.01)], seed=0)
trainer = qzo.ZOTrainer(
    model=model,
    args=TrainingArguments(out, max_steps=int(steps), per_device_train_batch_size=8, logging_steps=1, save_steps=int(steps), report_to="none"),
    train_dataset=[{"input_ids": tokenizer(line)["input_ids"]} for line in open(texts).read().splitlines()],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
    optimizers=(zo, None),  # its rate is that of the scales; the schedule is the Trainer's
)
trainer.train()
trainer.save_model(out)  # an ordinary checkpoint of the format that was read
