"""`sbrush serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from sbrush.cli.flags import (
    MACHINE,
    DeviceFlag,
    LoraFlag,
    Precision,
    PrecisionFlag,
    Runtime,
    StartFlag,
    StudentFlag,
    VaeFlag,
)
from sbrush.console import info
from sbrush.models.lora_request import parse_loras
from sbrush.sampling.targets import Images, Target

ACCESS = "Access"
EXAMPLE = "Example: sbrush serve --student runs/stickers"


def serve(
    student: StudentFlag = None,
    lora: LoraFlag = None,
    vae: VaeFlag = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 127.0.0.1: only this machine can connect. 0.0.0.0: other machines can too, "
            "which needs --api-key or --no-auth.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.", min=0, max=65535)] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that every request must have, as 'Authorization: Bearer KEY' or as the password that a browser "
            "asks for. Better set SBRUSH_API_KEY, because other users of the machine can see command lines.",
            metavar="KEY",
            envvar="SBRUSH_API_KEY",
            show_envvar=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Answer everyone who can reach --host, without a key.", rich_help_panel=ACCESS),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that requests may use for this server, such as that of a proxy in front of it. IP "
            "addresses and localhost are always allowed. May be repeated.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web site whose pages may use the server, such as https://front.example. May be repeated.",
            metavar="ORIGIN",
            show_default=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log each prompt and its seed. By default prompts are not logged.")
    ] = False,
    start_timestep: StartFlag = None,
    batch: Annotated[
        int,
        typer.Option(
            help="Largest number of images drawn at once, from requests that overlap. Lower it if memory runs out.",
            min=1,
            rich_help_panel=MACHINE,
        ),
    ] = 16,
    queue: Annotated[
        int,
        typer.Option(
            help="Largest number of images that may wait. A request beyond it is answered with status 429 and the time "
            "after which to try again.",
            min=1,
            rich_help_panel=MACHINE,
        ),
    ] = 256,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = Precision.auto,
    runtime: Annotated[
        Runtime,
        typer.Option(
            "--runtime",
            help="Library that draws. torch: torch and diffusers, which negative prompts need. onnx: onnxruntime, on "
            "the CPU in float32, for the built-in students and for those that were exported to ONNX. auto: torch, but "
            "onnx for exported ones.",
            rich_help_panel=MACHINE,
        ),
    ] = Runtime.auto,
) -> None:
    """Serve a web page that redraws the image as you type, and the OpenAI and AUTOMATIC1111 image APIs.

    Prints the page's address when it is ready. The page loads nothing from elsewhere, and nothing leaves the machine.
    """
    from sbrush.serving.address import Access, bind, check_access

    loras = parse_loras(lora)
    access = Access(api_key, tuple(allow_host or ()), tuple(allow_origin or ()))
    sock = bind(host, port)
    with sock:
        check_access(sock, host, access, no_auth=no_auth)
        info("loading torch and the student ...")
        from sbrush.device import pick_device, pick_dtype
        from sbrush.sampling.files import SampleRequest
        from sbrush.serving.server import WARM_UP, Capacity
        from sbrush.serving.server import serve as run

        where = pick_device(device)
        request = SampleRequest(
            Images([WARM_UP], [0]), Target(None), student=student, start_timestep=start_timestep, loras=loras,
            vae=vae, device=where, dtype=pick_dtype(precision.value, where, "sample"), runtime=runtime.value,
        )  # fmt: skip
        run(request, sock, access, Capacity(batch, queue), log_prompts=log_prompts)
