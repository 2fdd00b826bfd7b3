"""The README, systemd unit and compose file of a kit.

Tests run every command of these texts outside a container.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedsgcg.deploy.coordinator.project import Project

UNITS: Final = Path(__file__).parents[1] / "systemd"
IMAGE: Final = "fedsgcg:cpu"
COORDINATOR_UNIT: Final = "fedsgcg-coordinator.service"
SITE_UNIT: Final = "fedsgcg-site.service"

COORDINATOR_README: Final = """\
# {name}: the coordinator

Hospitals reach this machine at `{server}`. That port must be open, no other. In this folder:

```bash
fedsgcg serve .      # the server: TLS, registered hospitals only; keep it running
fedsgcg run .        # start the study; the same command resumes a stopped run
fedsgcg status .     # hospitals online, current round, missing answers
```

To run the server under systemd use `{unit}`.
Also: `fedsgcg stop .`, `fedsgcg resume .`. Results: `runs/`.

`ca.key`, `server.key`, `token` and `executor.secret` are secrets (mode 0600). Never send them.
Back up this folder. `ca.key` is needed only to make the server's certificate: keep it offline
(`fedsgcg provision ... --ca-key FILE` uses it from there), or at least encrypted. Give each
hospital its own folder of `sites/` over a secure channel, and compare two fingerprints with it over
the phone: the authority's, and that of the hospital's key when you register it. {issued}
"""

SITE_README: Final = """\
# {site} in the federation {name}

This machine opens no port: it only makes outgoing connections to `{server}`. Fill in `data_root`
in `site.yaml` and read the rest of that file: it says what may leave this hospital, and it takes
precedence over the coordinator's settings. Then, in this folder:

```bash
{first}fedsgcg-site check .      # data, GPU, disk, clock and link; each problem comes with its fix
fedsgcg-site approve .    # review the code that will run here, and approve it
fedsgcg-site join .       # take part; keep it running
```

To run it under systemd use `{unit}`.
Also: `fedsgcg-site status .`, `fedsgcg-site ledger .` (what left this hospital),
`fedsgcg-site leave .`.

`site.key` is this hospital's identity (mode 0600). Never send it. If it is lost, inform the
coordinator. `fedsgcg-site check .` shows the fingerprints of the authority and of this key: compare
both with the coordinator's over the phone.
"""

REQUEST: Final = """\
fedsgcg-site request .    # makes site.key here; send site.pub (not secret) to the coordinator
"""

ISSUED: Final = "Then delete your\ncopy of its `site.key`."
SITE_KEYS: Final = "No private\nkey of a hospital is ever here."

COORDINATOR_COMPOSE: Final = """\
# One container: the coordinator's server. Start the study with
# `docker compose exec coordinator fedsgcg run /kit`.
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
# One container: this hospital. It opens no port. Set FEDSGCG_DATA to the folder of the images; it
# is mounted read-only, and `data_root` in site.yaml is then /data. With a GPU:
# FEDSGCG_IMAGE=fedsgcg:cuda and `--profile gpu`.
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
    """Return file name -> text for the coordinator's kit."""
    return {
        "README.md": COORDINATOR_README.format(
            name=project.name,
            server=project.server,
            unit=COORDINATOR_UNIT,
            issued=ISSUED if project.keys == "issued" else SITE_KEYS,
        ),
        "compose.yaml": COORDINATOR_COMPOSE.format(image=IMAGE, port=project.address[1]),
        COORDINATOR_UNIT: (UNITS / COORDINATOR_UNIT).read_text(encoding="utf-8"),
    }


def site_files(project: Project, site: str) -> dict[str, str]:
    """Return file name -> text for a site's kit.

    `settings.txt` holds the project's plan: `fedsgcg-site check` measures with these settings.
    """
    names = {"site": site, "name": project.name, "server": project.server, "unit": SITE_UNIT}
    first = REQUEST if project.keys == "site" else ""
    return {
        "README.md": SITE_README.format(first=first, **names),
        "compose.yaml": SITE_COMPOSE.format(image=IMAGE),
        "settings.txt": "".join(f"{text}\n" for text in project.plan),
        SITE_UNIT: (UNITS / SITE_UNIT).read_text(encoding="utf-8"),
    }
