"""Pre-trained models: loading them, putting adapter slots on them, PEFT adapters in and out."""

import logging

# PEFT imports bitsandbytes wherever it is installed, and that tells some CPUs of a kernel to download that nothing here would use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
