// Lets the library run on systems older than the one that it was compiled on.
//
// Since glibc 2.32 this variable tells libstdc++ that a process has one thread, so that it may count
// references without atomic instructions. A library that asks for the variable needs that glibc. Here
// it is, private to the library, and says no.
extern "C" {
char __libc_single_threaded = 0;  // NOLINT(bugprone-reserved-identifier)
}
