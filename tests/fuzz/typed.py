"""Well-formed texts for every text widget of the pack, by the widget's id."""

TYPED: dict[str, tuple[str, ...]] = {
    "network_args": (
        "conv_dim=4 conv_alpha=1\nfactor=8",
        "exclude_patterns=[r'.*single.*', r'.*mod.*'] verbose=True",
        '--network_args loraplus_lr_ratio=4 "rank_dropout=0.1"',
    ),
    "exclude_patterns": (
        r".*single_blocks.*",
        r"double_blocks\.(0|1)\..*qkv" + "\n.*proj",
        "[r'.*img.*']",
    ),
    "include_patterns": (r".*txt_(in|out).*", r".*linear[12]$" + "\n.*mod.*"),
    "metadata": ('{"modelspec.author": "me"}', '{"a": {"b": [1, 2.5, null]}}'),
    "filename_prefix": ("loras/braid", "a/b c", "%date:yyyy-MM-dd%/x", "x"),
    "output_name": ("my_lora", "folder/my_lora", "a b.c"),
    "optimizer_args": (
        "weight_decay=0.01\nbetas=(0.9, 0.99)",
        "eps=1e-8 amsgrad=True",
        "fused=None",
    ),
    "lr_scheduler_args": ("num_cycles=3", "min_lr_ratio=0.1 rex_alpha=0.1", "power=2.0\nlr_end=0"),
    "optimizer_class": (
        "torch.optim.NAdam",
        "transformers.optimization.Adafactor",
        "schedulefree.AdamWScheduleFree",
        "RMSprop",
    ),
    "resume": ("latest", "lora/lora-step00000002.state", "/tmp/x.state"),
    "logging_dir": ("logs", "logs/a b"),
    "log_prefix": ("", "run_"),
    "log_tracker_name": ("network_train", "my project"),
    "wandb_run_name": ("", "a run"),
    "pattern": ("*.safetensors", "run-step*.safetensors", "**/*-step[0-9]*.safetensors"),
    "folder": ("run", "."),
    "path": ("", "/no/loras", "~/loras"),
    "sigma_rels": ("0.05, 0.1, 0.15", "0.2\n0.25", "0.28868"),
    "mag_ratios": ("1.0,1.02,0.98,0.9", "1,1,1\n1,0.9,0.8", "0"),
    "file": ("a.json", "x/b.json"),
}
