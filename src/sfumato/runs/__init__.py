"""The run folder and the loop that every trainer writes as `for step in run.steps(n)`.

    RUN/config.toml     the resolved config; `sfumato train NAME RUN/config.toml` runs it again
    RUN/run.json        the program, and what the training depends on beside its config
    RUN/pictures.json   by what each picture is known again, to say which has changed
    RUN/log.jsonl       one line a step, one a measurement
    RUN/plot.png        the curves of the log
    RUN/samples.png     the growing sheet of sample pictures, RUN/samples/ each of them
    RUN/checkpoints/    whole states; `sfumato resume RUN` goes on from the newest
    RUN/NAME.safetensors, RUN/README.md      what was learned, and its card

A trainer hands over what must survive (`run.keep`), what happens now and then (`run.every`), and asks of each step
whether its numbers are `healthy`. Checkpoints, resuming, signals, log, progress and going back after broken numbers
are the run's.
"""
