// Package logic gives a request its meaning: it takes the bytes a client sent and says which
// operation with which arguments they stand for. It is pure, keeps nothing from one request to
// the next, and is all that ever parses what a client wrote.
//
// It runs in workers ([Serve], program redoubt-store-logic) that are replaced, by default after
// every response. A worker is given one request and the number of the domain it came from. It
// never sees the contents of the store, nor other clients, nor a transaction: it needs none of
// them, and what a worker does not have it cannot give away when a request takes it over. So
// the division is sharper than one in which the worker would get a view of the contents and
// return changes to them: it returns an [Action], the arguments of the one operation that the
// request's header named, and package state carries it out with the rights of the client
// ([Action.Check] says what it accepts).
package logic

import (
	"bytes"
	"strconv"
	"strings"

	"redoubt.dev/redoubt/store/tree"
	"redoubt.dev/redoubt/store/wire"
)

// A Request is one message of a client, without what State keeps to itself: the transaction
// and the request id.
type Request struct {
	Domain  tree.Domain
	Type    wire.Type
	Payload []byte
}

// An Action is the arguments of the operation that a request's type names. Fields that the type
// does not need are zero.
type Action struct {
	Errno    tree.Errno // the request is refused: nothing else is set
	Path     string     // absolute, or a special event
	Relative bool       // the client wrote Path without its home directory
	Token    string     // of a watch
	Value    []byte     // what to write
	Perms    []tree.Perm
	Domain   tree.Domain // the domain the request is about
	Target   tree.Domain
	Offset   uint32   // DIRECTORY_PART
	Commit   bool     // TRANSACTION_END
	Words    []string // CONTROL
}

// maxDomain is the largest domid ("Values commonly included in payloads").
const maxDomain = 65535

// Decide parses a request.
func Decide(r Request) Action {
	a, err := parse(r)
	if err != nil {
		return Action{Errno: err.(tree.Errno)} //nolint:errorlint // parse returns nothing else
	}
	return a
}

func parse(r Request) (a Action, err error) {
	switch r.Type {
	case wire.Read, wire.Directory, wire.GetPerms, wire.Mkdir, wire.Remove:
		s, err := wire.Split(r.Payload, 1, false)
		if err != nil {
			return a, tree.EINVAL
		}
		return a, a.path(r, s[0])
	case wire.Write:
		path, value, ok := bytes.Cut(r.Payload, []byte{0})
		if !ok {
			return a, tree.EINVAL
		}
		a.Value = value
		return a, a.path(r, string(path))
	case wire.DirectoryPart:
		s, err := wire.Split(bytes.TrimSuffix(r.Payload, []byte{0}), 2, true)
		if err != nil {
			return a, tree.EINVAL
		}
		n, err := strconv.ParseUint(s[1], 10, 32)
		if err != nil {
			return a, tree.EINVAL
		}
		a.Offset = uint32(n)
		return a, a.path(r, s[0])
	case wire.SetPerms:
		s, err := wire.SplitAll(r.Payload, 2)
		if err != nil {
			return a, tree.EINVAL
		}
		for _, x := range s[1:] {
			p, err := tree.ParsePerm(x)
			if err != nil {
				return a, tree.EINVAL
			}
			a.Perms = append(a.Perms, p)
		}
		return a, a.path(r, s[0])
	case wire.Watch, wire.Unwatch: // what follows the token is reserved
		s, err := wire.SplitAll(r.Payload, 2)
		if err != nil {
			return a, tree.EINVAL
		}
		a.Token = s[1]
		return a, a.path(r, s[0])
	case wire.TransactionStart, wire.ResetWatches:
		if len(r.Payload) > 0 && !bytes.Equal(r.Payload, []byte{0}) {
			return a, tree.EINVAL
		}
		return a, nil
	case wire.TransactionEnd:
		switch string(r.Payload) {
		case "T\x00":
			a.Commit = true
		case "F\x00":
		default:
			return a, tree.EINVAL
		}
		return a, nil
	case wire.Introduce, wire.Release, wire.GetDomainPath, wire.IsDomainIntroduced, wire.Resume, wire.SetTarget:
		return domains(r)
	case wire.Control:
		s, err := wire.SplitAll(r.Payload, 1)
		if err != nil {
			return a, tree.EINVAL
		}
		a.Words = s
		return a, nil
	}
	return a, tree.ENOSYS
}

func domains(r Request) (a Action, err error) {
	least := map[wire.Type]int{wire.Introduce: 3, wire.SetTarget: 2}[r.Type]
	s, err := wire.SplitAll(r.Payload, max(least, 1))
	if err != nil {
		return a, tree.EINVAL
	}
	if r.Type != wire.Introduce && len(s) != max(least, 1) {
		return a, tree.EINVAL
	}
	if a.Domain, err = domid(s[0]); err == nil && r.Type == wire.SetTarget {
		a.Target, err = domid(s[1])
	}
	return a, err
}

func domid(s string) (tree.Domain, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n > maxDomain {
		return 0, tree.EINVAL
	}
	return tree.Domain(n), nil
}

// path resolves a client's path beneath its home, where it is relative.
func (a *Action) path(r Request, p string) error {
	switch {
	case strings.HasPrefix(p, "@") && special(r.Type):
		if len(p) > wire.MaxRelPath {
			return tree.EINVAL
		}
		a.Path = p
		return nil
	case strings.HasPrefix(p, "/"):
		a.Path = p
	case p == "" || len(p) > wire.MaxRelPath:
		return tree.EINVAL
	default:
		a.Path, a.Relative = tree.Home(r.Domain)+"/"+p, true
	}
	return tree.Check(a.Path)
}

// special reports whether an operation takes the name of a special event for a path.
func special(t wire.Type) bool {
	return t == wire.Watch || t == wire.Unwatch || t == wire.GetPerms || t == wire.SetPerms
}

// Shown is the watched path as the client d wrote it.
func (a Action) Shown(d tree.Domain) string {
	if a.Relative {
		return strings.TrimPrefix(a.Path, tree.Home(d)+"/")
	}
	return a.Path
}
