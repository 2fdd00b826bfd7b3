"""What a kit holds besides keys and settings: how to start it, for a shell, for systemd and for a container engine.

Every command in these texts is one that a test runs outside a container.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from deploy.coordinator.project import Project

UNITS: Final = Path(__file__).parents[1] / "systemd"
IMAGE: Final = "fedsgcg:cpu"
COORDINATOR_UNIT: Final = "fedsgcg-coordinator.service"
SITE_UNIT: Final = "fedsgcg-site.service"

COORDINATOR_README: Final = """\
# {name}: the coordinator

Hospitals reach this machine at `{server}`; that port must be open, no other. In this folder:

```bash
fedsgcg serve .      # the server: TLS, only registered hospitals; leave it running (systemd: {unit})
fedsgcg run .        # start the study; the same command goes on where a run stopped
fedsgcg status .     # who is there, which round, who is late
```

Also: `fedsgcg stop .`, `fedsgcg resume .`. Results: `runs/`.

`ca.key`, `server.key`, `token` and `executor.secret` are secrets: mode 0600, never to be sent. Back up this folder;
`ca.key` may lie off-line except when certificates or kits are made. Hand each hospital its own folder of `sites/` by a
safe way, tell it the authority's fingerprint by telephone, then delete your copy of its `site.key`.
"""

SITE_README: Final = """\
# {site} in the federation {name}

Nothing here opens a port: this machine calls `{server}`, outward only. Fill in `data_root` in `site.yaml` and read the
rest of it: it says what may leave, and it beats what the coordinator asks for. Then, in this folder:

```bash
{first}fedsgcg-site check .      # data, GPU, disk, clock, link: each with its repair
fedsgcg-site approve .    # look at the program that will run here, and allow it
fedsgcg-site join .       # take part; leave it running (systemd: {unit})
```

Also: `fedsgcg-site status .`, `fedsgcg-site ledger .` (what left this hospital), `fedsgcg-site leave .`.
`site.key` is this hospital's identity: mode 0600, never to be sent. Tell the coordinator if it is lost.
"""

REQUEST: Final = """\
fedsgcg-site request .    # makes site.key here; send site.pub, which is no secret, to the coordinator
"""

COORDINATOR_COMPOSE: Final = """\
# One container: the coordinator's server. `docker compose exec coordinator fedsgcg run /kit` starts the study.
services:
  coordinator:
    image: {image}
    command: ["fedsgcg", "serve", "/kit", "--listen", "0.0.0.0"]
    user: "10001:10001"
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    pids_limit: 512
    mem_limit: ${{FEDSGCG_MEMORY:-16g}}
    tmpfs: [/tmp]
    ports: ["{port}:{port}"]
    volumes:
      - type: bind
        source: .
        target: /kit
    restart: unless-stopped
    stop_grace_period: 60s
"""

SITE_COMPOSE: Final = """\
# One container: this hospital. It opens no port. Set FEDSGCG_DATA to the folder of the images; it is mounted read-only,
# and `data_root` in site.yaml is then /data. With a GPU: FEDSGCG_IMAGE=fedsgcg:cuda and `--profile gpu`.
x-site: &site
  image: ${{FEDSGCG_IMAGE:-{image}}}
  command: ["fedsgcg-site", "join", "/kit"]
  user: "10001:10001"
  read_only: true
  cap_drop: [ALL]
  security_opt: ["no-new-privileges:true"]
  pids_limit: 1024
  mem_limit: ${{FEDSGCG_MEMORY:-16g}}
  shm_size: 2g
  tmpfs: [/tmp]
  volumes:
    - type: bind
      source: .
      target: /kit
    - type: bind
      source: ${{FEDSGCG_DATA:?the folder of the images}}
      target: /data
      read_only: true
  restart: unless-stopped
  stop_grace_period: 60s

services:
  site:
    <<: *site
    profiles: [cpu]
  site-gpu:
    <<: *site
    profiles: [gpu]
    deploy:
      resources:
        reservations:
          devices:
            - driver: nvidia
              count: 1
              capabilities: [gpu]
"""


def coordinator_files(project: Project) -> dict[str, str]:
    """File name -> text of the coordinator's kit."""
    return {
        "README.md": COORDINATOR_README.format(
            name=project.name, server=project.server, unit=COORDINATOR_UNIT
        ),
        "compose.yaml": COORDINATOR_COMPOSE.format(image=IMAGE, port=project.address[1]),
        COORDINATOR_UNIT: (UNITS / COORDINATOR_UNIT).read_text(encoding="utf-8"),
    }


def site_files(project: Project, site: str) -> dict[str, str]:
    """File name -> text of a hospital's kit."""
    names = {"site": site, "name": project.name, "server": project.server, "unit": SITE_UNIT}
    first = REQUEST if project.keys == "requested" else ""
    return {
        "README.md": SITE_README.format(first=first, **names),
        "compose.yaml": SITE_COMPOSE.format(image=IMAGE),
        "settings.txt": "".join(
            f"{text}\n" for text in project.plan
        ),  # `fedsgcg-site check` measures with these
        SITE_UNIT: (UNITS / SITE_UNIT).read_text(encoding="utf-8"),
    }
