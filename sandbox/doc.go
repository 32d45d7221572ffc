// Package sandbox confines the processes of Redoubt. It is the only package that makes
// namespaces, drops capabilities or installs seccomp filters.
//
// A process in its sandbox has an own user id on the host, own user, mount, process, IPC, network,
// UTS and cgroup namespaces, a read-only root that is empty or holds what its [Spec] lists, no
// capability but those listed, no_new_privs, a Landlock domain, limits, and a seccomp filter
// that allows what its [Policy] lists. What a Spec does not declare is not there.
//
// # How a process gets into its sandbox
//
// The parent starts a launcher ([LauncherMain]) in new namespaces. One thread of the launcher
// builds the root, gives up every privilege, installs the filter and then executes the program
// from a descriptor. Every thread of the program is thus born inside: no attribute has to be
// spread over threads that exist already, which is the difficulty with doing it inside a Go
// program (capabilities, no_new_privs and Landlock belong to threads, see credentials(7)), and a
// program in C needs no change. The threads of the launcher die in execve(2).
//
// The filter allows no execve and no execveat. Each call it does not allow is held by the kernel and told to
// the parent (seccomp_unotify(2)); the parent lets the launcher's one execveat pass, and from
// then on answers every such call by ending the process, with the name of the call as the reason.
// Where the parent is gone the kernel refuses such calls with ENOSYS: it fails closed.
//
// The program is process 1 of its namespace: signals it has no handler for do not reach it, save
// SIGKILL and SIGSTOP from outside (pid_namespaces(7)), and its end ends whatever it started.
package sandbox
