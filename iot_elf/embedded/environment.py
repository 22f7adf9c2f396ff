# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "ministack>=1.5.33,<1.6", "boto3==1.43.106", "botocore==1.43.106",
#     "cryptography>=41.0",
# ]
# ///
"""What `uv run elf.py --local` installs for the embedded AWS IoT: its own environment, from the lines above."""
