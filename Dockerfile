FROM python:3.13-slim

# A user without any rights, to whom the volume belongs. Its home is where ~/.aws is mounted, by other users as well.
RUN useradd --uid 1000 --home-dir /home/elf elf \
 && install --directory --owner=elf --group=elf --mode=0755 /home/elf \
 && install --directory --owner=elf --group=elf --mode=0700 /elf/misc

COPY requirements.txt /elf/
RUN pip install --no-cache-dir --requirement /elf/requirements.txt
COPY iot_elf /elf/iot_elf/
# Once, as nothing is compiled later; a builder may set other times on the files.
RUN python -m compileall -q --invalidation-mode unchecked-hash /elf/iot_elf
COPY elf.py example.json example-shadow.json example-template.json /elf/

ENV HOME=/home/elf PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER elf
WORKDIR /home/elf
VOLUME /elf/misc
ENTRYPOINT ["python", "/elf/elf.py"]
CMD ["--help"]
