"""A documented name of `rmsearch.train.lora`."""

from rmsearch.train.lora import lora, main

if __name__ == "__main__":
    main(lora)
