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
    RuntimeFlag,
    StartFlag,
    StudentFlag,
    VaeFlag,
)
from sbrush.console import info
from sbrush.models.lora_request import parse_loras
from sbrush.sampling.targets import Images, Target

ACCESS = "Who may ask"
EXAMPLE = "Example: sbrush serve --student runs/stickers"


def serve(
    student: StudentFlag = None,
    lora: LoraFlag = None,
    vae: VaeFlag = None,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. 127.0.0.1 is this machine alone; 0.0.0.0 lets other machines in.",
            metavar="ADDRESS",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any free one.", min=0, max=65535)] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that every request must have, as 'Authorization: Bearer KEY' or as the password that a browser "
            "asks for. Other users of the machine see command lines: better set SBRUSH_API_KEY.",
            metavar="KEY",
            envvar="SBRUSH_API_KEY",
            show_envvar=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option("--no-auth", help="Let everyone in who reaches --host, without a key.", rich_help_panel=ACCESS),
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name by which the server may be called, such as that of a proxy in front of it. Addresses and "
            "localhost always may. Give it again for more.",
            metavar="NAME",
            show_default=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Site whose pages may ask the server, such as https://front.example. Give it again for more.",
            metavar="ORIGIN",
            show_default=False,
            rich_help_panel=ACCESS,
        ),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log each prompt and its seed. By default nothing tells prompts.")
    ] = False,
    start_timestep: StartFlag = None,
    batch: Annotated[
        int,
        typer.Option(
            help="Images drawn at once, of requests that overlap. Lower it if memory runs out.",
            min=1,
            rich_help_panel=MACHINE,
        ),
    ] = 16,
    queue: Annotated[
        int,
        typer.Option(
            help="Images that may wait. Beyond them a request is answered with 429 and when to try again.",
            min=1,
            rich_help_panel=MACHINE,
        ),
    ] = 256,
    device: DeviceFlag = "auto",
    precision: PrecisionFlag = Precision.auto,
    runtime: RuntimeFlag = Runtime.auto,
) -> None:
    """Serve a page where the image follows the typing, and the OpenAI and AUTOMATIC1111 image APIs.

    With --runtime auto, torch draws, for it alone takes negative prompts; onnx draws for students exported to it.

    Prints the page's address when it is ready. Nothing is loaded from elsewhere, and nothing leaves the machine.
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
