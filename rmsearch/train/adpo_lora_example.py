"""A documented name of `rmsearch.train.adpo_lora`."""

from rmsearch.train.adpo_lora import adpo_lora, main

if __name__ == "__main__":
    main(adpo_lora)
