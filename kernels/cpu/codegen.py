"""How Numba's functions become object code here: each is optimised once, and machine code is made once, at the end.

Numba by itself optimises a function again within each function that calls it, and makes machine code of all of them
every time. Here a caller sees the short functions that it calls, for LLVM to inline them, and the names of the others.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import registry, types
from numba.core.codegen import CPUCodeLibrary, JITCPUCodegen

SHORT = 400  # lines of LLVM's text, up to which a function may be inlined: LLVM takes a quarter of that at most
_DEFINITION = re.compile(r"^define .*?^}\n", re.MULTILINE | re.DOTALL)
_LINKAGE = re.compile(r"^define (?:(?:linkonce_odr|weak_odr|external|internal|private|available_externally) )?")
_NOT_OF_DECLARATIONS = re.compile(r"\b(?:dso_local|local_unnamed_addr|unnamed_addr) | personality .*$")


class _Library(CPUCodeLibrary):
    """One function, and those that it calls."""

    def finalize(self) -> None:
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._final_module.link_in(library.for_callers(), preserve=True)
        self._optimize_final_module()
        self._finalized = True

    def for_callers(self) -> llvm.ModuleRef:
        """A module with this function's definition, if it is short, or else its name."""
        self._ensure_finalized()
        return llvm.parse_assembly(self._text_for_callers())

    @cache  # noqa: B019  # the compiling process ends soon
    def _text_for_callers(self) -> str:
        text = str(self._final_module)
        always = {f"#{group}" for group in re.findall(r"^attributes #(\d+) = \{.*\balwaysinline\b", text, re.MULTILINE)}

        def shown(match: re.Match[str]) -> str:
            head, _, body = match.group().partition("\n")
            if body.count("\n") <= SHORT or always & set(re.findall(r"#\d+", head)):
                return f"{_LINKAGE.sub('define available_externally ', head)}\n{body}"
            return _NOT_OF_DECLARATIONS.sub("", _LINKAGE.sub("declare ", head).removesuffix("{")) + "\n"

        return _DEFINITION.sub(shown, text)

    def with_callees(self) -> list[_Library]:
        """This library and all that it needs, directly or not."""
        found: dict[_Library, None] = {}
        todo = [self]
        while todo:
            library = todo.pop()
            if library not in found:
                found[library] = None
                todo += library._linking_libraries
        return list(found)

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # nothing runs in this process

    def _finalize_specific(self) -> None:
        pass


class _Codegen(JITCPUCodegen):
    _library_class: Any = _Library

    def __init__(self, name: str, triple: str, cpu: str, features: str) -> None:
        self._triple, self._cpu, self._features = triple, cpu, features
        super().__init__(name)

    def _init(self, llvm_module: Any) -> None:
        """What CPUCodegen does, for any machine, and without an engine to run things in."""
        target = llvm.Target.from_triple(self._triple)
        self._tm_features = self._features
        self._tm = target.create_target_machine(
            cpu=self._cpu, features=self._features, opt=3, reloc="pic", codemodel="default"
        )
        self._target_data = self._tm.target_data
        self._data_layout = str(self._target_data)
        self._loopvect, self._opt_level = False, 0

    def _create_empty_module(self, name: str) -> ir.Module:
        module = super()._create_empty_module(name)
        module.triple = self._triple
        return module

    def set_env(self, env_name: str, env: Any) -> None:
        pass

    def _get_host_cpu_name(self) -> str:
        return self._cpu

    def _get_host_cpu_features(self) -> str:
        return self._features

    def _check_llvm_bugs(self) -> None:
        pass


def compile_for(triple: str, cpu: str, features: str) -> None:
    """From now on, have Numba compile for this CPU of such machines. This process cannot run what it compiles."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    context = registry.cpu_target.target_context
    context._internal_codegen = _Codegen("svdengine", triple, cpu, features)


def object_code(entries: Mapping[str, Any]) -> bytes:
    """Object code that exports functions of int64, as `jit` makes them, under these names."""
    context = registry.cpu_target.target_context
    machine = context.codegen()._tm
    module = llvm.parse_assembly(str(context.codegen()._create_empty_module(next(iter(entries)))))
    libraries: dict[_Library, None] = {}
    for symbol, function in entries.items():
        function.compile((types.int64,) * len(inspect.signature(function.py_func).parameters))
        (compiled,) = function.overloads.values()
        libraries.update(dict.fromkeys(compiled.library.with_callees()))
        module.link_in(_entry(context, compiled, symbol))
    for library in libraries:
        module.link_in(library._final_module, preserve=True)
    for found in module.functions:
        if not found.is_declaration and found.name not in entries:
            found.linkage = llvm.Linkage.internal
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=0))
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, builder)
    return machine.emit_object(module)


def _entry(context: Any, compiled: Any, symbol: str) -> llvm.ModuleRef:
    """A module with the function that others call by name, in C's way; Numba's own has its result elsewhere."""
    descriptor, word = compiled.fndesc, ir.IntType(64)
    module = context.codegen()._create_empty_module(symbol)
    callee = context.call_conv.get_function_type(descriptor.restype, descriptor.argtypes)
    inner = ir.Function(module, callee, descriptor.llvm_func_name)
    outer = ir.Function(module, ir.FunctionType(word, [word] * len(descriptor.argtypes)), symbol)
    builder = ir.IRBuilder(outer.append_basic_block())
    _, result = context.call_conv.call_function(builder, inner, descriptor.restype, descriptor.argtypes, outer.args)
    builder.ret(result if result.type == word else ir.Constant(word, 0))
    return llvm.parse_assembly(str(module))
