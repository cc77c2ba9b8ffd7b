// The units of the core, one file a concept.
#include "arena.cpp"
#include "locks.cpp"
#include "queue.cpp"
#include "slots.cpp"
#include "waiting.cpp"

int main(int argc, char** argv) { return check::run_all(argc, argv); }
