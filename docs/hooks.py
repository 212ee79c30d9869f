"""What the site has beside the pages of docs/: pages made of the repository's own files, and links to those files.

The API pages follow from the public names, the notebooks' pages from examples/, and two pages are CONTRIBUTING.md and CHANGELOG.md. MkDocs calls
the functions at the end.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "flashcoreset"
# Files of the repository that are pages of the site: from the root of the repository to the root of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "writing_a_kernel.md",
    "CHANGELOG.md": "changes.md",
    "examples/README.md": "notebooks/index.md",
}
# Where the API pages look for a name, and in this order.
GROUPS = {
    "facility_location": "Facility location",
    "sinkhorn": "Optimal transport",
    "sketch": "Sketching",
    "gradients": "Per-sample gradients",
    "matching": "Gradient matching",
    "caratheodory": "Carathéodory reduction",
    "scores": "Sample scores",
    "methods": "Methods",
    "distributed": "Several machines",
    "kernels": "Low-level calls",
    "plot": "Pictures",
    "integrations": "Training loops and pipelines",
    "compat": "Drop-in",
    "_core": "Results, errors, memory",
}
MODULES = {
    "kernels": ["flashcoreset.kernels"],
    "plot": ["flashcoreset.plot"],
    "integrations": [f"flashcoreset.integrations.{name}" for name in ("torch", "transformers", "sklearn")],
    "compat": ["flashcoreset.compat"],
    "distributed": ["flashcoreset.distributed"],
}


def _with_products(text: str) -> str:
    """Text in which inner products such as <P, C> are not taken for HTML."""
    parts = re.split(r"(`[^`]*`)", text)  # code stays as it is
    return "".join(
        part if part.startswith("`") else re.sub(r"<(\w+, ?\w+)>", r"&lt;\1&gt;", part) for part in parts
    )


class Examples(griffe.Extension):
    """The examples of docstrings are shown as code: griffe calls such a section "Examples", these docstrings "Example"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text, *rest = re.split(r"^( *)Example:$", obj.docstring.value, maxsplit=1, flags=re.MULTILINE)
            obj.docstring.value = _with_products(text) + "".join(
                [rest[0], "Examples:", rest[1]] if rest else []
            )


def _imports(path: Path) -> dict[str, str]:
    """The names that a file imports from modules, with the module of each."""
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _defined_in(name: str, module: str) -> str:
    """The module that defines a name which can be imported from `module`: not one that imports it in turn."""
    folder = PACKAGE.parent.joinpath(*module.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    origin = _imports(path).get(name)
    return module if origin is None else _defined_in(name, origin)


def public_names() -> dict[str, str]:
    """The names of ``flashcoreset.__all__`` that are no modules, with the module that defines each."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    origins = _imports(PACKAGE / "__init__.py")
    (listed,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "__all__"
    )
    return {
        name: _defined_in(name, origins[name])
        for name in listed
        if origins.get(name, "flashcoreset") not in ("flashcoreset", "importlib.metadata")
    }


def kernels_problems() -> dict[str, str]:
    """The names of the classes that low-level calls take, as `flashcoreset.kernels` has them, with what each is a name of."""
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse((PACKAGE / "kernels" / "__init__.py").read_text()).body
        if isinstance(node, ast.ImportFrom) and node.module != "flashcoreset.kernels"
        for alias in node.names
    }


def api_pages() -> dict[str, str]:
    """The pages of the API: one per part of the package, and a list of all names."""
    pages, listing = {}, ["# API", "", "The public names, as `flashcoreset.NAME`, by subject.", ""]
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name, module in public_names().items():
        groups.setdefault(module.split(".")[1], []).append(f"{module}.{name}")
    for group, names in groups.items():
        modules = MODULES.get(group, [])
        if not names and not modules:
            continue
        title = GROUPS.get(group, group.replace("_", " ").capitalize())
        page = group.strip("_")
        blocks = [f"::: {name}" for name in names]
        for module in modules:
            blocks.append(f"::: {module}\n    options:\n      show_root_full_path: true\n")
        if group == "kernels":
            blocks += [
                f"::: {of}\n    options:\n      heading: {name}\n" for name, of in kernels_problems().items()
            ]
        pages[f"api/{page}.md"] = "\n\n".join([f"# {title}", *blocks]) + "\n"
        found = [f"[`{name.rpartition('.')[2]}`]({page}.md#{name})" for name in names]
        found += [f"[`{module}`]({page}.md#{module})" for module in modules]
        listing += [f"- **{title}**: {', '.join(found)}"]
    pages["api/index.md"] = "\n".join(listing) + "\n"
    return pages


def _outputs(cell: dict[str, Any], name: str, pictures: dict[str, bytes]) -> list[str]:
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            path = f"{name}-{len(pictures)}.png"
            pictures[path] = base64.b64decode(data["image/png"])
            parts.append(f"![What the cell above draws]({path})")
        elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            parts.append(f"```text\n{text}\n```")
    return parts


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the pictures that it shows."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif source:
            parts += [f"```python\n{source}\n```", *_outputs(cell, path.stem, pictures)]
    parts.append(f"The notebook is `examples/{path.name}` in the repository.")
    return "\n\n".join(parts) + "\n", pictures


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Completes the navigation: generated pages stand below the entries of their first pages, pages that no entry names under "More",
    and an entry whose page is not in this checkout is left out."""
    api = list(api_pages())
    notebooks = [f"notebooks/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.ipynb"))]
    below = {
        "api/index.md": [page for page in api if page != "api/index.md"],
        "notebooks/index.md": notebooks,
    }
    present = {path.name for path in (ROOT / "docs").glob("*.md")} | {*PAGES.values()} | {*api}
    named: set[str] = set()

    def completed(entry: Any) -> Any:
        if isinstance(entry, list):
            return [part for part in map(completed, entry) if part]
        if isinstance(entry, dict):
            return {
                title: page
                for title, page in ((title, completed(page)) for title, page in entry.items())
                if page
            }
        named.add(entry)
        if entry not in present:
            return None
        return [entry, *below[entry]] if entry in below else entry

    config.nav = completed(config.nav)
    more = sorted(page for page in present - named - {*api} if page not in PAGES.values())
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    generated: dict[str, str | bytes] = {**api_pages()}
    for source, page in PAGES.items():
        if source != "README.md":  # docs/index.md stands in its place
            generated[page] = (ROOT / source).read_text()
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        text, pictures = notebook_page(path)
        generated[f"notebooks/{path.stem}.md"] = text
        generated.update({f"notebooks/{name}": content for name, content in pictures.items()})
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages, or, if a file is no page, its path in words."""
    uri = page.file.src_uri
    sources = {page_uri: source for source, page_uri in PAGES.items()}
    if uri.startswith("api/"):
        return markdown
    source = sources.get(uri, f"docs/{uri}") if uri != "index.md" else "docs/index.md"
    if uri.startswith("notebooks/") and uri not in sources:
        source = f"examples/{Path(uri).stem}.ipynb"

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path in PAGES:
            destination, anchor = PAGES[path], anchor if path != "README.md" else ""
        elif re.fullmatch(r"examples/\w+\.ipynb", path):
            destination = f"notebooks/{Path(path).stem}.md"
        elif path.startswith("docs/"):
            destination = path.removeprefix("docs/")
        else:
            return text if text.strip("`") == path else f"{text} (`{path}`)"
        return f"[{text}]({posixpath.relpath(destination, posixpath.dirname(uri) or '.')}{anchor})"

    pattern = r"(?<!!)\[(?P<text>[^\]]+)\]\((?!https?:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)]*)?\)"
    # Code is left as it is: every other part between fences.
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(
        part if part.startswith("```") else _with_products(re.sub(pattern, rewritten, part)) for part in parts
    )


SHIM = "https://unpkg.com/iframe-worker/shim"  # the plugin for pages that are opened from a folder would fetch it: worker.js is ours


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    to_root = posixpath.relpath(".", posixpath.dirname(page.file.dest_uri) or ".")
    return output.replace(SHIM, f"{to_root}/worker.js")


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    return output_content.replace(SHIM, "worker.js")
