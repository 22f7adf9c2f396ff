"""What the tests stand on. Each module uses only those above it.

program      the program's files, and its constants wherever they are
botocore_once   what botocore works out again and again, once
forking      processes of elf.py and Locust that are forked; fork_server.py forks them, fork_client.py is one in a shell
machine      ports, processes, terminals; what a system can deny to a user's Python
aws          a MiniStack that ELF did not start, and accounts in it
shell        a user of elf.py: in another process (Elf) and in this one (InProcess)
failures     what ELF says of a failure, by its name; the names that no test has seen
embedded     the embedded AWS IoT of a fleet, asked without ELF
sign_in      STS, SSO, and the metadata services of containers and instances
networks     TCP relays that break, ports that lead nowhere, servers of somebody else
aws_hosts    the host names of AWS, over TLS, behind a proxy
mqtt         a client that is not ELF's, and a broker that does what a script says
http_proxy   between ELF and MiniStack: AWS's distance, its quotas, its faults
mqtt_proxy   between things and MiniStack: messages are lost, repeated, swapped
witness/, slow_disk/, as_on_windows/   what the Python of an elf.py under test loads first
"""

from support import program as program  # which lets Python find iot_elf
