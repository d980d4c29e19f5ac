"""Try a candidate beside the model in production, and exchange them: by hand, or by a watcher that needs nobody.

    python -m app.canary start detector --uri models:/detector@candidate --share 0.1 [--shadow]
    python -m app.canary watch detector [--rules FILE] [--log FILE] [--once] [--no-promote]
    python -m app.canary promote detector
    python -m app.canary rollback detector [--production]
    python -m app.canary serve detector [--uri models:/detector@production]
    python -m app.canary show detector

In: Ray's dashboard, which knows what runs (``app.canary_config``); the store, which knows what the trial has shown
(``app.trials``); rules (``app.canary_rules``). Out: another ``user_config``, lines for people, and a line of JSON for
each look in a log. Nothing else is kept anywhere: whoever is killed and started again goes on, and what is done already
is not done again. No replica of production is started again, and no request is lost.

Replicas look an alias up when they start and when the text of their URI changes: one that has been moved since is not
what they serve, and those that start later serve another revision than the rest. ``serve`` has all of them take up the
version that has it, by its number.

A checkpoint that replicas of production cannot load is refused, and they go on with what they have. Who told them to
serve it sees that in the application's ``GET /v1/models`` (with the key in ``DEEPTRUST_API_KEY``, where it asks for
one), has the configuration name again what it named before, which those that start later can load, and fails.

``watch`` ends with 0: promoted (or, with ``--no-promote``, fit to be); 3: rolled back, or refused by production; 4:
undecided (``--once``).
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import CliPositionalArg, CliSubCommand

from app import canary_config as running
from app.canary_config import CanaryError, DashboardAway, Refused, ServeApi
from app.canary_rules import AllRules, Decision, Rules, RulesError, decide, read_rules
from app.config import CANARIES, MODELS, ModelName
from app.store.database import Database, StoreUnavailable
from app.store.settings import StoreSettings
from app.trials import Evidence, read_evidence
from deployments.checkpoints import CheckpointError, pinned, resolve

PROMOTED, ROLLED_BACK, UNDECIDED = 0, 3, 4
#: Longest wait for a canary to go to zero.
_CLEAR_S = 180.0
_TASKS = {"detector": "detection", "captioner": "captioning", "tagger": "tagging"}
#: What is to be done where nothing is known that could be put back.
_HOW_TO_SERVE = {
    model: f"`python -m train.registry rollback {model} --alias production`, then `python -m app.canary serve {model}`"
    for model in ("detector", "captioner")
} | {"tagger": "`python -m app.canary serve tagger --uri CHECKPOINT`, and the same into serve_config.yaml"}


class NothingKept(CanaryError):
    """Answers are not kept, so a trial shows nothing, however long one waits."""


class CanarySettings(BaseModel):
    """What all commands need."""

    model_config = ConfigDict(extra="forbid")

    model: CliPositionalArg[ModelName]
    application: str = Field("deeptrust", description="name of the Serve application")
    dashboard: str | None = Field(
        None,
        description="Ray's dashboard; unset: RAY_API_SERVER_ADDRESS, the application on this machine with HTTP port "
        "PORT, or http://127.0.0.1:8265",
    )
    timeout_s: float = Field(900.0, gt=0, description="longest wait for replicas")


class Canary:
    """One model's canary in a running application."""

    def __init__(self, settings: CanarySettings) -> None:
        self.model, self.name, self.timeout_s = settings.model, settings.application, settings.timeout_s
        self.api = ServeApi.find(settings.dashboard)

    def application(self) -> running.Config:
        """The application's part of the running configuration."""
        return running.application_of(self.api.config(), self.name)

    def start(self, uri: str, share: float, shadow: float) -> bool:
        """Begin a trial; False: just this one is running.

        Raises:
            CanaryError: the canary does not come up; it is at zero again.
            CheckpointError: the URI names no checkpoint.
        """
        uri = self._found(uri)
        application = self.application()
        now = running.shares_of(application, self.model)
        if now == (share, shadow) and running.uri_of(application, CANARIES[self.model]) == uri:
            return False
        if running.uri_of(application, MODELS[self.model]) == uri:
            raise CanaryError(f"{uri} is in production already")
        self.api.change(lambda config: running.with_candidate(config, self.name, self.model, uri))
        try:
            self.api.wait(self.name, CANARIES[self.model], 1, self.timeout_s)
        except CanaryError:
            self.api.change(lambda config: running.without_replicas(config, self.name, self.model))
            raise
        self.api.change(
            lambda config: running.with_shares(config, self.name, self.model, share, shadow, round(time.time(), 3))
        )
        self.api.wait(self.name, "Ingress", 1, self.timeout_s)
        return True

    def promote(self) -> str:
        """Production takes over what the canary serves, in place; returns its URI.

        Raises:
            Refused: it could not, and goes on with what it has; the trial is over.
            CheckpointError: what production serves has an alias that cannot be looked up, and could not be put back.
        """
        application = self.application()
        uri, in_production = (running.uri_of(application, of[self.model]) for of in (CANARIES, MODELS))
        if not any(running.shares_of(application, self.model)) and uri != in_production:
            raise CanaryError(f"no trial of a {self.model} is running: start one, or look with `show`")
        before = pinned(in_production)
        self.api.change(lambda config: running.promoted(config, self.name, self.model, before))
        self.api.wait(self.name, MODELS[self.model], 1, self.timeout_s)
        try:
            self.confirm(uri, application)
        finally:
            self.clear()
        return uri

    def roll_back(self) -> None:
        """End a trial; nobody's picture goes to the canary any more."""
        self.api.change(lambda config: running.withdrawn(config, self.name, self.model))
        self.api.wait(self.name, "Ingress", 1, self.timeout_s)
        self.clear()

    def put_back(self) -> str:
        """Production serves again what it served before its last promotion, in place; returns its URI.

        Raises:
            CanaryError: what that was is not known, or it is in service already.
            Refused: it cannot be loaded any more; it is still there to put back.
        """
        self.roll_back()
        application = self.application()
        if self.model not in running.ingress_of(application).before:
            raise CanaryError(
                f"there is nothing to put back, and {MODELS[self.model]} serves "
                f"{running.uri_of(application, MODELS[self.model])}: what it served before was put back already, or "
                "somebody has deployed since its promotion (a head that starts does), which forgets it. To have it "
                f"serve another: {_HOW_TO_SERVE[self.model]}"
            )
        config = self.api.change(lambda config: running.put_back(config, self.name, self.model))
        self.api.wait(self.name, MODELS[self.model], 1, self.timeout_s)
        uri = running.uri_of(running.application_of(config, self.name), MODELS[self.model])
        self.confirm(uri, application)
        return uri

    def serve(self, uri: str) -> tuple[str, bool]:
        """Production serves a checkpoint, in place; returns its URI, and whether that made a difference.

        Raises:
            CanaryError: it is a checkpoint of another kind, or does not come up.
            Refused: it cannot be loaded, and production goes on with what it has.
            CheckpointError: the URI names no checkpoint.
        """
        uri = self._found(uri)
        application = self.application()
        self.api.change(lambda config: running.serving(config, self.name, self.model, uri))
        self.api.wait(self.name, MODELS[self.model], 1, self.timeout_s)
        self.confirm(uri, application)
        return uri, running.uri_of(application, MODELS[self.model]) != uri

    def confirm(self, uri: str, was: running.Config) -> None:
        """See that production serves ``uri``, which it has been told.

        Raises:
            Refused: it does not; it is told again what it was in ``was``, the application's part from before.
            CanaryError: what it serves is not known.
        """
        try:
            self.api.confirm(self.name, self.model, uri)
        except Refused:  # a replica that starts would fail where the others go on
            self.api.change(lambda config: running.restored(config, self.name, self.model, uri, was))
            self.api.wait(self.name, MODELS[self.model], 1, self.timeout_s)
            raise

    def _found(self, uri: str) -> str:
        """A checkpoint of this model by the name that it keeps.

        Raises:
            CanaryError: it is one of another kind.
            CheckpointError: there is none.
        """
        uri = pinned(uri)
        task = resolve(uri).card.task
        if task not in (_TASKS[self.model], "unknown"):
            raise CanaryError(f"{uri} is a checkpoint for {task}, and no {self.model}")
        return uri

    def clear(self) -> None:
        """The canary goes to zero, if it has no trial. That it takes its time changes nothing for anybody."""
        if any(running.shares_of(self.application(), self.model)):
            return
        self.api.change(lambda config: running.without_replicas(config, self.name, self.model))
        try:
            self.api.wait(self.name, CANARIES[self.model], 0, min(self.timeout_s, _CLEAR_S))
        except CanaryError as error:
            print(f"the canary is told to go to zero, and has not yet: {error}", file=sys.stderr, flush=True)

    def evidence(self, application: running.Config, since_s: float) -> Evidence:
        """What a trial has shown.

        Raises:
            NothingKept: by the settings of the application.
            StoreUnavailable: not now.
        """
        settings = StoreSettings.model_validate((application.get("args") or {}).get("store") or {})
        if settings.keep == "off":
            raise NothingKept(
                "the application keeps no answers (args.store.keep is off), so a trial shows nothing: give it a store "
                "(see serve_config.yaml), or promote and roll back by hand"
            )
        database = Database(settings.database_url, 30.0, 30.0)
        try:
            with database.reading() as connection:
                return read_evidence(connection, self.model, since_s)
        finally:
            database.close()


class Watcher:
    """Looks at a trial again and again and acts on what the rules say.

    Raises from ``watch``:
        CanaryError: there is no trial that could be watched.
    """

    def __init__(self, canary: Canary, settings: WatchCommand, rules: Rules) -> None:
        self.canary, self.settings, self.rules = canary, settings, rules
        self._told = ""
        self._seen_at, self._since, self._production = time.monotonic(), time.time(), ""
        self._candidate = pinned(settings.uri) if settings.uri else None

    def watch(self) -> int:
        """Until a decision; returns the exit status."""
        while True:
            try:
                ended = self._look()
            # while it was acting: the next look tries again, or finds it done
            except (DashboardAway, CheckpointError) as error:
                if self.settings.once:
                    raise
                self._say(f"not done yet: {error}")
                ended = None
            if ended is not None:
                return ended
            if self.settings.once:
                return UNDECIDED
            time.sleep(self.settings.interval_s)

    def _look(self) -> int | None:
        try:
            application = self.canary.application()
            since = running.ingress_of(application).since.get(self.canary.model)
            running_trial = any(running.shares_of(application, self.canary.model))
            evidence = None
            if since is not None and running_trial:
                self._candidate = running.uri_of(application, CANARIES[self.canary.model])
                self._since, self._production = since, running.uri_of(application, MODELS[self.canary.model])
                evidence = self.canary.evidence(application, since)
        except (CanaryError, StoreUnavailable) as error:
            blind_s = time.monotonic() - self._seen_at
            if self.settings.once or isinstance(error, NothingKept):
                raise
            self._say(f"nothing is known at present: {error}")
            if blind_s < self.settings.blind_s:
                return None
            age_s, why = time.time() - self._since, f"nothing has been known for {blind_s:.0f} s"
            blind = Decision(action="roll_back", why=why, age_s=round(age_s, 1), answers=0, findings=[])
            self._log(blind, self._candidate or "", self._production, Evidence())
            self._say(f"rolling back: {why}")
            self.canary.roll_back()
            self._say("rolled back")
            return ROLLED_BACK
        self._seen_at = time.monotonic()
        if evidence is None or since is None:
            return self._without_trial(application)
        decision = decide(evidence, self.rules, time.time() - since)
        return self._act(decision, application, evidence)

    def _without_trial(self, application: running.Config) -> int:
        """Another watcher or a person was quicker, or this one was killed or lost the dashboard in the middle of it."""
        self.canary.clear()
        uri = running.uri_of(application, MODELS[self.canary.model])
        if self._candidate is None:
            raise CanaryError(f"no trial of a {self.canary.model} is running; production serves {uri}")
        promoted = uri == self._candidate
        if promoted:
            try:
                self.canary.confirm(uri, application)
            except Refused as error:
                return self._not_promoted(error)
        self._say(f"no trial is running; production serves {uri}")
        return PROMOTED if promoted else ROLLED_BACK

    def _not_promoted(self, error: Refused) -> int:
        self._say(f"not promoted: {error}")
        return ROLLED_BACK

    def _act(self, decision: Decision, application: running.Config, evidence: Evidence) -> int | None:
        model = self.canary.model
        candidate, production = (running.uri_of(application, of[model]) for of in (CANARIES, MODELS))
        self._log(decision, candidate, production, evidence)
        if decision.action == "roll_back":
            self._say(f"rolling back {candidate}: {decision.why}")
            self.canary.roll_back()
            self._say(f"rolled back; {production} goes on alone")
            return ROLLED_BACK
        if decision.action == "promote":
            if not self.settings.promote:
                self._say(f"fit to be promoted: {candidate}: {decision.why}")
                return PROMOTED
            self._say(f"promoting {candidate}: {decision.why}")
            try:
                self.canary.promote()
            except Refused as error:
                return self._not_promoted(error)
            self._say(f"promoted; before: {production}")
            return PROMOTED
        self._say(f"going on with {candidate}: {decision.why}")
        return None

    def _say(self, text: str) -> None:
        if text != self._told:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            print(f"{now} {self.canary.model}: {text}", flush=True)
        self._told = text

    def _log(self, decision: Decision, candidate: str, production: str, evidence: Evidence) -> None:
        line = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "model": self.canary.model,
            "candidate": {"uri": candidate, "revisions": sorted(evidence.candidate.revisions)},
            "production": {"uri": production, "revisions": sorted(evidence.production.revisions)},
            **decision.model_dump(mode="json"),
        }
        file = self.settings.log_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as log:
            log.write(json.dumps(line) + "\n")


# ---- commands ----------------------------------------------------------------------------------------------------


class StartCommand(CanarySettings):
    """Begin a trial: the canary is started from zero with the candidate, then gets its share."""

    uri: str = Field(description="checkpoint of the candidate; an alias of the registry is replaced by its version")
    share: float = Field(0.1, gt=0, le=1, description="share of the pictures, by their hash")
    shadow: bool = Field(False, description="answers of the candidate are written down and not returned")

    def run(self) -> int:
        """Do it."""
        shares = (0.0, self.share) if self.shadow else (self.share, 0.0)
        fresh = Canary(self).start(self.uri, *shares)
        what = "is asked too, for" if self.shadow else "answers"
        print(f"{self.uri} {what} {self.share:.0%} of the pictures" + ("" if fresh else " already"))
        return 0


class WatchCommand(CanarySettings):
    """Watch a trial and promote or roll back by rules."""

    rules: Path | None = Field(None, description="YAML file with rules for each model; unset: the defaults")
    log: Path | None = Field(
        None,
        description="gets a line of JSON for each look; unset: ~/.local/share/deeptrust/canary/MODEL.jsonl",
    )
    interval_s: float = Field(15.0, gt=0, description="time between two looks")
    blind_s: float = Field(600.0, gt=0, description="a trial of which nothing is known for so long is rolled back")
    promote: bool = Field(True, description="off: end where it would promote, and leave the trial running")
    once: bool = Field(False, description="look once")
    uri: str | None = Field(
        None, description="the candidate: where its trial is over, the exit status says what became of it"
    )

    def log_file(self) -> Path:
        """Where looks are written down."""
        return self.log or Path(f"~/.local/share/deeptrust/canary/{self.model}.jsonl").expanduser()

    def run(self) -> int:
        """Do it."""
        rules: AllRules = read_rules(self.rules)
        return Watcher(Canary(self), self, rules.of(self.model)).watch()


class PromoteCommand(CanarySettings):
    """Production takes over what the canary serves, whatever the rules say."""

    def run(self) -> int:
        """Do it."""
        print(f"{MODELS[self.model]} serves {Canary(self).promote()} now")
        return 0


class RollbackCommand(CanarySettings):
    """End the trial; with --production, put back what production served before its last promotion."""

    production: bool = Field(False, description="production goes back too")

    def run(self) -> int:
        """Do it."""
        canary = Canary(self)
        if self.production:
            print(f"{MODELS[self.model]} serves {canary.put_back()} again")
        else:
            canary.roll_back()
            print(f"no trial of a {self.model} is running any more")
        return 0


class ServeCommand(CanarySettings):
    """Production serves a checkpoint, in place: the version that has its alias now, or another."""

    uri: str | None = Field(
        None,
        description="checkpoint; an alias of the registry is replaced by its version; unset: models:/MODEL@production",
    )

    def run(self) -> int:
        """Do it."""
        uri, fresh = Canary(self).serve(self.uri or f"models:/{self.model}@production")
        print(f"{MODELS[self.model]} serves {uri} " + ("now" if fresh else "already"))
        return 0


class ShowCommand(CanarySettings):
    """What runs, and what the trial has shown so far by the rules."""

    rules: Path | None = Field(None, description="YAML file with rules for each model; unset: the defaults")

    def run(self) -> int:
        """Do it."""
        canary, rules = Canary(self), read_rules(self.rules).of(self.model)
        application = canary.application()
        ingress = running.ingress_of(application)
        share, shadow = running.shares_of(application, self.model)
        for title, of in (("production", MODELS), ("canary", CANARIES)):
            name = of[self.model]
            count = canary.api.replicas(self.application, name)
            print(f"{title:11} {running.uri_of(application, name)}, {count} replicas")
        print(f"{'share':11} {share:.1%} answered by the canary, {shadow:.1%} in its shadow")
        if before := ingress.before.get(self.model):
            print(f"{'before':11} {before}")
        if (since := ingress.since.get(self.model)) is not None and share + shadow > 0:
            decision = decide(canary.evidence(application, since), rules, time.time() - since)
            print(f"{'now':11} {decision.action}: {decision.why}")
            print("\n".join(f"  {finding}" for finding in decision.findings))
        return 0


class CanaryCommands(BaseModel):
    """Try a candidate beside the model in production, and exchange them."""

    model_config = ConfigDict(extra="forbid")

    start: CliSubCommand[StartCommand]
    watch: CliSubCommand[WatchCommand]
    promote: CliSubCommand[PromoteCommand]
    rollback: CliSubCommand[RollbackCommand]
    serve: CliSubCommand[ServeCommand]
    show: CliSubCommand[ShowCommand]


def main(arguments: list[str] | None = None) -> None:
    """Run a command; what is wrong becomes one line and exit status 1."""
    from pydantic_settings import CliApp, get_subcommand

    try:
        command: Any = get_subcommand(CliApp.run(CanaryCommands, cli_args=arguments))
        status = command.run()
    except (CanaryError, RulesError, CheckpointError, StoreUnavailable, ValidationError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status)


if __name__ == "__main__":
    main()
