"""`fedsgcg provision`: make the coordinator's kit and one start-up kit per site.

    KITS/coordinator/   project.yaml, ca.crt, ca.key, server.crt, server.key, token,
                        keys/NAME.pub, revoked/, ...
    KITS/sites/NAME/    site.yaml, ca.crt, README.md, compose.yaml, fedsgcg-site.service, and
                        site.key and site.pub where `keys: issued` makes them here

A second call keeps valid keys and certificates, and every existing `site.yaml`.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedsgcg.clients.guard.site_file import SiteFile, write_site_file
from fedsgcg.common.errors import fail
from fedsgcg.common.settings.compose import nearest
from fedsgcg.deploy.certificates import (
    RENEW_WITHIN_DAYS,
    Authority,
    certificate_fingerprint,
    days_left,
    fingerprint,
    is_encrypted,
    is_signed_by,
    make_authority,
    make_server_certificate,
    make_site_key,
    names_of,
    read_authority,
    read_certificate,
    read_public_key,
    spoken_fingerprint,
    write_authority,
    write_authority_key,
    write_secret,
    write_server,
)
from fedsgcg.deploy.coordinator.kit_files import coordinator_files, site_files
from fedsgcg.deploy.coordinator.passphrase import ACTION, Passphrase
from fedsgcg.deploy.coordinator.project import (
    Kit,
    Project,
    is_loopback,
    project_text,
    read_project,
)

TOKEN_BYTES: Final = 32


@dataclass
class Provisioned:
    """Result of `fedsgcg provision`.

    Attributes:
        kit: The coordinator's kit.
        sites: Folder of the sites' kits.
        made: Descriptions of what was made; they contain no secret.
        waiting: Sites whose public key is not registered yet.
        revoked: Sites whose key is revoked and not replaced.
        warnings: Conditions that need the coordinator's attention.
        authority: Fingerprint of the authority's certificate, for sites to compare.
        registered: Site -> fingerprint of its registered key, for the sites to compare.
    """

    kit: Kit
    sites: Path
    made: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    authority: str = ""
    registered: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AuthorityKey:
    """Where the authority's private key is and what opens it.

    Attributes:
        file: Its file, e.g. on a removable disk; None = `ca.key` in the coordinator's kit.
        passphrase: Source of its passphrase.
    """

    file: Path | None = None
    passphrase: Passphrase = field(default_factory=Passphrase)

    def path(self, kit: Kit) -> Path:
        """Return the file of the key."""
        return self.file or kit.folder / "ca.key"

    def open(self, kit: Kit) -> Authority:
        """Read the authority.

        Raises:
            FedsgcgError: DEP-616 when the key is not here or its passphrase is missing, DEP-603
                when it cannot be used.
        """
        path = self.path(kit)
        if not path.exists():
            action = f"put it back for this command, or name it: --ca-key FILE ({path.name})"
            raise fail("DEP-616", where=str(path), found="no such file", action=action)
        passphrase = self.passphrase.for_old_key(path) if is_encrypted(path) else None
        return read_authority(kit.folder, path, passphrase)


def provision(
    project_file: Path,
    output: Path,
    *,
    renew: bool = False,
    revoke: Sequence[str] = (),
    reissue: Sequence[str] = (),
    register: Sequence[tuple[str, Path]] = (),
    authority: AuthorityKey | None = None,
) -> Provisioned:
    """Make the kits, or bring them up to date.

    Args:
        project_file: The project file.
        output: Folder of all kits.
        renew: Make a new server certificate although the old one is still valid.
        revoke: Sites whose keys are revoked.
        reissue: Sites whose keys are revoked and replaced by new ones.
        register: (site, file with its public key), for keys made at the sites.
        authority: Where the authority's private key is; default: in the kit.

    Raises:
        FedsgcgError: DEP-602 for the project file, DEP-603 for a key or certificate, DEP-605 when
            `output` belongs to another project, DEP-606 for a site that the project does not have,
            DEP-616 for the authority's private key.
    """
    project = read_project(project_file)
    kit = Kit((output / "coordinator").resolve())
    done = Provisioned(kit, (output / "sites").resolve())
    _check_same_project(kit, project)
    _check_known(project, [*revoke, *reissue, *(site for site, _ in register)])
    for folder in (kit.folder, kit.keys, kit.revoked):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _warn_of_new_default(kit, project, done)
    authority = authority or AuthorityKey()
    _authority(kit, project, authority, done)
    _server(kit, project, authority, done, renew=renew)
    _credential(kit, done)
    for site in [*revoke, *reissue]:
        _revoke(kit, site, done)
    for site, path in register:
        _register(kit, site, read_public_key(path), done)
    for site in project.sites:
        _site_kit(kit, project, site, done, reissue=site in reissue)
    (kit.folder / "project.yaml").write_text(project_text(project), encoding="utf-8")
    for name, text in coordinator_files(project).items():
        (kit.folder / name).write_text(text, encoding="utf-8")
    _warn_of_unlisted_keys(kit, project, done)
    if warning := project.missing_limits():
        done.warnings.append(str(warning))
    return done


def _check_same_project(kit: Kit, project: Project) -> None:
    path = kit.folder / "project.yaml"
    if path.is_file() and (before := read_project(path)).name != project.name:
        action = "choose another folder with -o"
        raise fail(
            "DEP-605", where=str(path), found=project.name, expected=before.name, action=action
        )


def _check_known(project: Project, sites: Sequence[str]) -> None:
    for site in sites:
        if site not in project.sites:
            raise fail(
                "DEP-606", where=site, found="no such site", action=nearest(site, project.sites)
            )


def _authority(kit: Kit, project: Project, key: AuthorityKey, done: Provisioned) -> None:
    """Make the authority once. A kit with `ca.crt` keeps it, also while its key is elsewhere."""
    path, offline = key.path(kit), key.file is not None
    if not (kit.folder / "ca.crt").exists():
        if path.exists():
            found = f"{path} without the ca.crt that belongs to it"
            raise fail("DEP-603", where=str(kit.folder), found=found, action="restore ca.crt")
        passphrase = key.passphrase.for_new_key()
        if passphrase is None and not is_loopback(project.address[0]):
            found = "no passphrase for the authority's private key"
            raise fail("DEP-616", where=str(path), found=found, action=ACTION)
        write_authority(kit.folder, make_authority(project.name), path, passphrase)
        how = "unencrypted, for this machine only" if passphrase is None else "encrypted"
        where = str(path) if offline else "ca.key stays with the coordinator"
        done.made.append(f"certificate authority (ca.crt; {where}, {how})")
    elif path.exists() and not is_encrypted(path):
        _encrypt(kit, project, key, done)
    done.authority = certificate_fingerprint(read_certificate(kit.folder / "ca.crt"))


def _encrypt(kit: Kit, project: Project, key: AuthorityKey, done: Provisioned) -> None:
    """Encrypt the unencrypted key of an older kit if there is a passphrase, else warn."""
    path = key.path(kit)
    if (passphrase := key.passphrase.given()) is not None:
        write_authority_key(path, read_authority(kit.folder, path).key, passphrase)
        done.made.append(f"{path.name} is encrypted now")
    elif not is_loopback(project.address[0]):
        done.warnings.append(f"{path} is not encrypted: give a passphrase ({ACTION})")


def _warn_of_new_default(kit: Kit, project: Project, done: Provisioned) -> None:
    """Explain to the coordinator of an older kit what has changed about keys."""
    path = kit.folder / "project.yaml"
    if project.keys == "site" and path.is_file() and read_project(path).keys == "issued":
        done.warnings.append(
            "keys: site is the default now: registered keys stay valid, and a site added from now "
            "on makes its own key. `keys: issued` in project.yaml makes new keys here as before"
        )


def _server(
    kit: Kit, project: Project, key: AuthorityKey, done: Provisioned, *, renew: bool
) -> None:
    """Make the server's certificate if it is missing, no longer valid, or to be renewed."""
    path = kit.folder / "server.crt"
    if path.exists() and not renew:
        old = read_certificate(path)
        fits = set(project.certificate_names) <= set(names_of(old)) and is_signed_by(
            old, read_certificate(kit.folder / "ca.crt")
        )
        if fits and (left := days_left(old)) > 0:
            if left < RENEW_WITHIN_DAYS:
                done.warnings.append(
                    f"the server's certificate expires in {left:.0f} days: --renew makes a new one"
                )
            return
    write_server(
        kit.folder,
        *make_server_certificate(
            key.open(kit), project.certificate_names, project.certificate_days
        ),
    )
    names = ", ".join(project.certificate_names)
    done.made.append(f"server certificate for {names}, valid for {project.certificate_days} days")


def _credential(kit: Kit, done: Provisioned) -> None:
    for path in (kit.token, kit.folder / "executor.secret"):
        if not path.exists():
            write_secret(path, secrets.token_urlsafe(TOKEN_BYTES).encode())
            done.made.append(f"credential ({path.name})")


def _revoke(kit: Kit, site: str, done: Provisioned) -> None:
    path = kit.keys / f"{site}.pub"
    if not path.exists():
        done.warnings.append(f"{site} has no registered key to revoke")
        return
    name = f"{site}-{fingerprint(read_public_key(path))}.pub"
    path.replace(kit.revoked / name)
    done.made.append(f"{site}: key revoked")


def _register(kit: Kit, site: str, line: str, done: Provisioned) -> None:
    """Register a site's public key; a revoked key or the key of another site is an error."""
    if _is_revoked(kit, line):
        action = "the site removes its site.key and makes a new one with fedsgcg-site request"
        raise fail(
            "DEP-603",
            where=site,
            found="a revoked key",
            expected="a new key",
            action=action,
        )
    for path in sorted(kit.keys.glob("*.pub")):
        if path.stem != site and fingerprint(read_public_key(path)) == fingerprint(line):
            raise fail(
                "DEP-603", where=site, found=f"the key of {path.stem}", expected="its own key"
            )
    path = kit.keys / f"{site}.pub"
    if path.exists():
        if fingerprint(read_public_key(path)) == fingerprint(line):
            return
        action = f"revoke the old one first: --revoke {site}"
        raise fail(
            "DEP-603",
            where=site,
            found="another key is registered",
            expected="one key per site",
            action=action,
        )
    path.write_text(f"{line} {site}\n", encoding="utf-8")
    done.made.append(f"{site}: public key registered")
    done.registered[site] = spoken_fingerprint(line)


def _site_kit(kit: Kit, project: Project, site: str, done: Provisioned, *, reissue: bool) -> None:
    folder = done.sites / site
    if not folder.exists():
        folder.mkdir(parents=True, mode=0o700)
        done.made.append(f"{site}: start-up kit")
    shutil.copyfile(kit.folder / "ca.crt", folder / "ca.crt")
    if (kit.keys / f"{site}.pub").exists():
        pass
    elif _was_revoked(kit, site) and not reissue:
        done.revoked.append(site)
    elif project.keys == "issued":
        _issue(kit, site, folder, done)
    else:
        if reissue:  # a key that was issued here earlier
            for name in ("site.key", "site.pub"):
                (folder / name).unlink(missing_ok=True)
        done.waiting.append(site)
    if not (folder / "site.yaml").exists():
        write_site_file(folder / "site.yaml", blank_site_file(project, site))
    for name, text in site_files(project, site).items():
        (folder / name).write_text(text, encoding="utf-8")


def _issue(kit: Kit, site: str, folder: Path, done: Provisioned) -> None:
    """Make a site's key in its kit and register the public key; a revoked key is replaced."""
    public = folder / "site.pub"
    if public.exists() and _is_revoked(kit, read_public_key(public)):
        for name in ("site.key", "site.pub"):
            (folder / name).unlink(missing_ok=True)
    _register(kit, site, " ".join(make_site_key(folder, site).split()[:2]), done)


def _was_revoked(kit: Kit, site: str) -> bool:
    return any(path.stem.rpartition("-")[0] == site for path in kit.revoked.glob("*.pub"))


def _is_revoked(kit: Kit, line: str) -> bool:
    return any(
        fingerprint(read_public_key(path)) == fingerprint(line)
        for path in kit.revoked.glob("*.pub")
    )


def blank_site_file(project: Project, site: str) -> SiteFile:
    """Return the `site.yaml` of a new kit; the hospital fills in its data folder."""
    return SiteFile(
        site=site,
        project=project.name,
        server=project.server,
        ca="ca.crt",
        key="site.key",
        data_root=project.data_root,
        home="home",
        cache="cache",
        approved="approved.json",
    )


def _warn_of_unlisted_keys(kit: Kit, project: Project, done: Provisioned) -> None:
    for path in sorted(kit.keys.glob("*.pub")):
        site = path.stem
        if site not in project.sites:
            done.warnings.append(
                f"{site} still has a registered key but is not in the project: "
                f"add it to sites and --revoke {site}"
            )
