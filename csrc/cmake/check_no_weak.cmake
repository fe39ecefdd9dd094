# Fails if an object compiled for one instruction set defines a weak symbol: the linker keeps one copy of each weak
# symbol for the whole library, which could then be one that this machine cannot run. Put helpers in an unnamed namespace.
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
execute_process(COMMAND "${NM}" -C --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]*" weak "${symbols}")
if(weak)
  list(JOIN weak "\n  " weak)
  message(FATAL_ERROR "weak symbols in per-ISA objects:\n  ${weak}")
endif()
