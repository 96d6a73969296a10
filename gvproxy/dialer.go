package main

import (
	"context"
	"net"
	"strconv"
	"time"

	"github.com/inetaf/tcpproxy"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// maxDialing is the number of the guest's connections that the host may be establishing. Further ones wait: the guest asks again after a second.
	maxDialing = 64
	// dialTimeout is about the time after which Linux in the guest gives up.
	dialTimeout = 2 * time.Minute
)

// translated maps addresses of the guest's network to addresses of the host. All other addresses are the same on both sides; without its entry the
// gateway's would be, too.
var translated = map[tcpip.Address]tcpip.Address{address(host): address("127.0.0.1"), address(gateway): address(nowhere)}

// linkLocal is the subnet of cloud metadata services, which hold the host's credentials. The guest must not reach it.
var linkLocal = tcpip.AddressWithPrefix{Address: address("169.254.0.0"), PrefixLen: 16}.Subnet()

// dialer connects the guest to the host's network. It replaces the library's (pkg/services/forwarder), which has no place for two settings: the size
// of receive buffers, and how many connections to silent addresses may be pending before further ones wait.
func dialer(guest *stack.Stack, receiveBuffer int) *tcp.Forwarder {
	return tcp.NewForwarder(guest, receiveBuffer, maxDialing, func(request *tcp.ForwarderRequest) {
		server, err := dialFor(request.ID())
		if err != nil {
			request.Complete(true)
			return
		}
		var queue waiter.Queue
		endpoint, failure := request.CreateEndpoint(&queue)
		request.Complete(false)
		if failure != nil {
			_ = server.Close()
			return
		}
		proxy := tcpproxy.DialProxy{DialContext: func(context.Context, string, string) (net.Conn, error) { return server, nil }}
		proxy.HandleConn(gonet.NewTCPConn(&queue, endpoint))
	})
}

func dialFor(wanted stack.TransportEndpointID) (net.Conn, error) {
	to := wanted.LocalAddress
	if linkLocal.Contains(to) {
		return nil, &net.AddrError{Err: "link-local", Addr: to.String()}
	}
	if meant, ok := translated[to]; ok {
		to = meant
	}
	return net.DialTimeout("tcp", net.JoinHostPort(to.String(), strconv.Itoa(int(wanted.LocalPort))), dialTimeout)
}
