"""Damaged files and hostile texts for every reader: `make fuzz`, and a short run in the suite.

mutate       bytes, texts and JSON, changed at random
containers   safetensors files, changed at random where their header says what is what
files        well-formed files to begin with, host_files those of a whole model
typed        well-formed texts, for every text widget
target       one reader with what it is given
targets      every target that needs no ComfyUI, with what reads files in readers
host_targets those that do, with the live route's in questions and every node's widgets in widgets
harness      one child process after another reads them, under limits
"""
