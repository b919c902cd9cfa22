"""Damaged files and hostile texts for every reader: `make fuzz`, and a short run in the suite.

mutate       bytes, texts and JSON, changed at random
containers   safetensors files, changed at random where their header says what is what
files        well-formed files to begin with
targets      what is read, and what reads it: every target that needs no ComfyUI
host_targets those that do
harness      one child process after another reads them, under limits
"""
